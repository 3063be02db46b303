"""One file for each data set, named as the set is, with its `ENTRY`; `registry` finds them."""
