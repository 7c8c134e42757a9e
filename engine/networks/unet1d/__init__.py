"""UNets over sequences."""
