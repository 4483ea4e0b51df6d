"""Networks from files and the hub, and back."""
