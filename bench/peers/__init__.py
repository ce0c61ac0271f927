"""The peers: each sets itself up outside the repository and runs at its best; `roster` has them all."""
