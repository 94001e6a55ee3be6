"""The application on top of the libraries: what a person runs and reads."""
