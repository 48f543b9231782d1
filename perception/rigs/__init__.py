"""Camera models, rig files, and importers of other calibration formats. Needs numpy, and PyYAML for YAML files.

- `models`: pinhole, Brown-Conrady, Kannala-Brandt, MEI and f-theta; `lenses` is their distortion and its inverse.
- `rig`: `Rig`, the named cameras of a vehicle, and its file format; `rig.schema.json` is its JSON Schema.
- `importers`: `import_rig`, which recognises a format; `datasets` and `ros` hold the formats.
- `documents`: reads files and fields with errors that name them.
- `*.yaml`: rigs of public datasets and typical vehicles, for `Rig.load("nuscenes")`.
"""

from perception.rigs.importers import import_rig
from perception.rigs.rig import Rig, RigCamera

__all__ = ["Rig", "RigCamera", "import_rig"]
