"""Networks as manifolds."""

from geoad.module.module import GeoModule as GeoModule
