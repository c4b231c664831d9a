"""What is trained on: a task is a dataset, a model and an objective, each found by its name."""
