"""The models: a package each, of which the flow knows three names.

- `info.inspect(path, ...)` says what a model is, in the driver and without torch: its `path`, its `input` (what it
  makes of a picture: decode.frames.Input), and the SHA-256 of all that decides its answers, by file (`files`) and
  together (`sha256`). Raises ModelError.
- `info.arguments(settings, info)` gives what its class is started with.
- The class, in a process that may use torch, loads it. Called with a pyarrow table of rows with frames, it returns the
  table with its own columns, or `error`, filled, and with the frames: it does not know what comes after it. Called
  with pictures, it returns rows as dicts. Raises ModelDied, and then its process has to end.
"""
