"""Configs of NanoMoE; a directory configs/ of a user's project adds to them."""

import pkgutil

__path__ = pkgutil.extend_path(__path__, __name__)
