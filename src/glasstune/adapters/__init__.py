"""Adapters by PEFT: options, injection, saving and reading back, switching off.

Import the modules one by one (`adapters.inject`, `adapters.saving`, ...): each pulls in torch and
peft, and this package must stay light.
"""

import glasstune.models  # noqa: F401 - quiets bitsandbytes before peft imports it
