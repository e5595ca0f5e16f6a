"""The models, a package each. The rest of Shardsight uses three names of each:

- `info.inspect(path, …)`: what the model is, for the driver and without torch. It has a `path`, an `input`
  (decode.frames.Input), the SHA-256 of every file that its results depend on (`files`), and one by
  which its weights are known (`sha256`). Raises ModelError.
- `info.arguments(settings, info)`: the keyword arguments for its class.
- The class (Yolo, PaliGemma). Called with a pyarrow table of rows with frames, it returns the table, frames included,
  with its own columns or `error` filled. Called with pictures, it returns rows as dicts. Raises ModelDied, after which
  its process has to end.
"""
