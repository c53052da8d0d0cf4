"""The window as durable files beside checkpoints, and back."""
