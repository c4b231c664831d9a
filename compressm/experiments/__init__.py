"""What the ``compressm`` command trains: tasks (dataset x model x objective), methods, and reports on them."""
