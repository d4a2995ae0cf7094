"""Connections: Christoffel symbols, geodesics, parallel transport, covariant derivatives."""

from geoad.connection.christoffel import Christoffel as Christoffel
from geoad.connection.christoffel import christoffel as christoffel
from geoad.connection.covariant import covariant_derivative as covariant_derivative
from geoad.connection.flow import flow as flow
from geoad.connection.geodesic import geodesic as geodesic
from geoad.connection.parallel import parallel_transport as parallel_transport
