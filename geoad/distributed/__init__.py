"""Several processes, each with its share of the data.

Every process holds the whole network at the same point. Three levels:

* `shard` gives each process its part of a data set. Losses, derivatives and curvature matrices over it are those of the whole
  data, in all processes, with the same bits: whatever is computed from them (natural gradients, eigenvalues) stays together.
* `kernel_rows` gives the rows of a tangent kernel that belong to the samples of this process.
* `all_reduce` combines what was computed from local data by hand: everything that is linear in the data.
"""

from geoad.distributed.exchange import ProcessError as ProcessError
from geoad.distributed.reduce import all_reduce as all_reduce
from geoad.distributed.reduce import require_same_point as require_same_point
from geoad.distributed.rows import kernel_rows as kernel_rows
from geoad.distributed.shard import Shard as Shard
from geoad.distributed.shard import shard as shard
