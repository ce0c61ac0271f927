#!/bin/sh
# Byte code for each folder given, since a read-only root leaves no room to write it; it never looks at the sources.
set -eu
python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash "$@" || true  # templates among libraries do not parse
