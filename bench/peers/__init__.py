"""One module per peer: `prepare` builds it outside the repository, `server` and `engine_rows` run it at its best."""
