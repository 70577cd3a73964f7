"""HTTP in and out: each module translates one group of routes to calls and back."""
