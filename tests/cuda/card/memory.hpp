// Memory of the tests on a GPU: from share_heap() on every operator new hands out page-locked memory, which the device reaches
// at the same address, so that tests may fill in vectors and hand them over.
#pragma once

namespace card {

// By default it is one stretch of 256 MiB. apart: each allocation is one of its own, slower, so that compute-sanitizer sees
// where it ends. False where the runtime gives out none.
bool share_heap(bool apart);
// From now on nothing is given back: the runtime may end before the last destructor.
void keep_heap();

}  // namespace card
