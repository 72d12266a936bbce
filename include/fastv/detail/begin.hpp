// fastv: no #pragma once. First thing in every header: keeps the macros of others (X11 has `#define Status int`) out.
#pragma push_macro("Status")
#pragma push_macro("check")
#undef Status
#undef check
