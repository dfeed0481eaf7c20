"""`make demo`: a real model through the whole path on two CPU cores."""
