"""What shows a run: pictures of it, and one self-contained page with its genealogy."""
