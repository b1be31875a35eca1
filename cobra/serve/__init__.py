"""Many conversations at once, over HTTP."""
