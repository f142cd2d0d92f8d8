"""The part that talks to people."""
