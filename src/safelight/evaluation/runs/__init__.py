"""What is to be made, what has been made, and what was said of it: manifests, two passes, one folder."""
