"""What a person starts: the command line, the quickstart, the demo."""
