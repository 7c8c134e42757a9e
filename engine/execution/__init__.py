"""Which path runs each part of an engine, how the network is called, and what is compiled or cached for that."""
