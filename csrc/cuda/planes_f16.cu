#include "cuda/planes.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueuePlanes<__half>(const PlanesPlan&, const PlanesArgs&, cudaStream_t);

}  // namespace jaxconv::cuda
