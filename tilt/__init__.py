"""The application on top of the libraries: commands, the app and reports."""
