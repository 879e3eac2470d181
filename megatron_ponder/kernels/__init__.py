"""The tensor functions that a pass calls. They do not communicate and keep no state."""
