"""The models of a repository: loading, versions, the registry."""
