"""The web app: its form, the runs that it starts, and their display."""
