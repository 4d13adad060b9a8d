"""mlx_lm.convert, which also says how long it took without the start of Python and its imports.

    scripts/mlx.sh scripts/mlx_lm_convert.py --model DIR --mlx-path OUT -q ...

The last line of its output is {"import_s": ..., "convert_s": ...}.
"""

import json
import time

start = time.perf_counter()
from mlx_lm.convert import main  # noqa: E402

imported = time.perf_counter()
main()
done = time.perf_counter()
print(json.dumps({"import_s": imported - start, "convert_s": done - imported}))
