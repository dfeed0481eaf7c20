"""What a run will train on, to look at before it costs anything."""
