"""Configs. A directory configs/ of a user's project may hold further ones."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
