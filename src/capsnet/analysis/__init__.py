"""Numbers about capsules; nothing here draws."""
