// fastv: the one place that states the version. CMake and the packaging read these three lines.
#pragma once

// The version, major.minor.patch. Before 1.0 a new minor version may break its users.
#define FASTV_VERSION_MAJOR 0
#define FASTV_VERSION_MINOR 1
#define FASTV_VERSION_PATCH 0
