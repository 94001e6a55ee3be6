"""The commands, one per module, with their options; `tilt.main` finds them."""
