#include "cuda/planes.cuh"

namespace jaxconv::cuda {

template cudaError_t EnqueuePlanes<float>(const PlanesPlan&, const PlanesArgs&, cudaStream_t);

}  // namespace jaxconv::cuda
