"""Text generation by backends: the executor, TensorRT-LLM's runtime, the source model."""

from phireg.generation.backend import BACKENDS as BACKENDS
from phireg.generation.backend import Backend as Backend
from phireg.generation.backend import Description as Description
from phireg.generation.backend import Options as Options
from phireg.generation.backend import Request as Request
from phireg.generation.backend import describe as describe
from phireg.generation.backend import open_backend as open_backend
from phireg.generation.backend import opener as opener
