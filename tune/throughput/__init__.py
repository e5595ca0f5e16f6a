"""The fastest configuration that is accurate enough, on the user's own pictures and machine."""
