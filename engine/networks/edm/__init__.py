"""EDM's UNets (Karras et al. 2022)."""
