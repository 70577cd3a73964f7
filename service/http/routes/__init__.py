"""The routes: each module translates one group of them to calls of the service."""
