"""The cascade: run the edge model, and ask the cloud only where the edge is not sure enough.

The app states how often its answers must agree with the cloud model's (``min_agreement=0.98``). A
threshold on the edge model's confidence, chosen on unlabelled traffic, holds that with a stated
confidence, for any model and any data, as long as traffic stays like the traffic it was chosen
on; a live audit watches whether it does.

Nothing here is imported by a call that does not ask for an agreement.
Explanation: docs/explanation/cascade.md.
"""

from __future__ import annotations
