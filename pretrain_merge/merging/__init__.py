"""Views of the window become weighted sums in the live model, and raw comes back."""
