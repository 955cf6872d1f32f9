# Names, parameters and types alone, from cuda_bindings-13.4.4-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl
# SHA-256 e1cef1eaf5a08cc3bf3675ca9d3f97f3fc7085998556c848b4053e74ba4ba392, by tests/contracts/make_surfaces.py.
from typing import Any

class cudaDeviceAttr:
    cudaDevAttrAsyncEngineCount: Any
    cudaDevAttrAtomicReductionSupported: Any
    cudaDevAttrCanFlushRemoteWrites: Any
    cudaDevAttrCanMapHostMemory: Any
    cudaDevAttrCanUseHostPointerForRegisteredMem: Any
    cudaDevAttrCigStreamsSupported: Any
    cudaDevAttrClockRate: Any
    cudaDevAttrClusterLaunch: Any
    cudaDevAttrComputeCapabilityMajor: Any
    cudaDevAttrComputeCapabilityMinor: Any
    cudaDevAttrComputeMode: Any
    cudaDevAttrComputePreemptionSupported: Any
    cudaDevAttrConcurrentKernels: Any
    cudaDevAttrConcurrentManagedAccess: Any
    cudaDevAttrCooperativeLaunch: Any
    cudaDevAttrD3D12CigSupported: Any
    cudaDevAttrDeferredMappingCudaArraySupported: Any
    cudaDevAttrDirectManagedMemAccessFromHost: Any
    cudaDevAttrEccEnabled: Any
    cudaDevAttrGPUDirectRDMAFlushWritesOptions: Any
    cudaDevAttrGPUDirectRDMASupported: Any
    cudaDevAttrGPUDirectRDMAWritesOrdering: Any
    cudaDevAttrGlobalL1CacheSupported: Any
    cudaDevAttrGlobalMemoryBusWidth: Any
    cudaDevAttrGpuOverlap: Any
    cudaDevAttrGpuPciDeviceId: Any
    cudaDevAttrGpuPciSubsystemId: Any
    cudaDevAttrHostMemoryPoolsSupported: Any
    cudaDevAttrHostNativeAtomicSupported: Any
    cudaDevAttrHostNumaId: Any
    cudaDevAttrHostNumaMemoryPoolsSupported: Any
    cudaDevAttrHostNumaMultinodeIpcSupported: Any
    cudaDevAttrHostRegisterReadOnlySupported: Any
    cudaDevAttrHostRegisterSupported: Any
    cudaDevAttrIntegrated: Any
    cudaDevAttrIpcEventSupport: Any
    cudaDevAttrIsMultiGpuBoard: Any
    cudaDevAttrKernelExecTimeout: Any
    cudaDevAttrL2CacheSize: Any
    cudaDevAttrLocalL1CacheSupported: Any
    cudaDevAttrLocalityDomainCount: Any
    cudaDevAttrLocalityDomainMultiprocessorCount: Any
    cudaDevAttrManagedMemory: Any
    cudaDevAttrMax: Any
    cudaDevAttrMaxAccessPolicyWindowSize: Any
    cudaDevAttrMaxBlockDimX: Any
    cudaDevAttrMaxBlockDimY: Any
    cudaDevAttrMaxBlockDimZ: Any
    cudaDevAttrMaxBlocksPerMultiprocessor: Any
    cudaDevAttrMaxGridDimX: Any
    cudaDevAttrMaxGridDimY: Any
    cudaDevAttrMaxGridDimZ: Any
    cudaDevAttrMaxPersistingL2CacheSize: Any
    cudaDevAttrMaxPitch: Any
    cudaDevAttrMaxRegistersPerBlock: Any
    cudaDevAttrMaxRegistersPerMultiprocessor: Any
    cudaDevAttrMaxSharedMemoryPerBlock: Any
    cudaDevAttrMaxSharedMemoryPerBlockOptin: Any
    cudaDevAttrMaxSharedMemoryPerMultiprocessor: Any
    cudaDevAttrMaxSurface1DLayeredLayers: Any
    cudaDevAttrMaxSurface1DLayeredWidth: Any
    cudaDevAttrMaxSurface1DWidth: Any
    cudaDevAttrMaxSurface2DHeight: Any
    cudaDevAttrMaxSurface2DLayeredHeight: Any
    cudaDevAttrMaxSurface2DLayeredLayers: Any
    cudaDevAttrMaxSurface2DLayeredWidth: Any
    cudaDevAttrMaxSurface2DWidth: Any
    cudaDevAttrMaxSurface3DDepth: Any
    cudaDevAttrMaxSurface3DHeight: Any
    cudaDevAttrMaxSurface3DWidth: Any
    cudaDevAttrMaxSurfaceCubemapLayeredLayers: Any
    cudaDevAttrMaxSurfaceCubemapLayeredWidth: Any
    cudaDevAttrMaxSurfaceCubemapWidth: Any
    cudaDevAttrMaxTexture1DLayeredLayers: Any
    cudaDevAttrMaxTexture1DLayeredWidth: Any
    cudaDevAttrMaxTexture1DLinearWidth: Any
    cudaDevAttrMaxTexture1DMipmappedWidth: Any
    cudaDevAttrMaxTexture1DWidth: Any
    cudaDevAttrMaxTexture2DGatherHeight: Any
    cudaDevAttrMaxTexture2DGatherWidth: Any
    cudaDevAttrMaxTexture2DHeight: Any
    cudaDevAttrMaxTexture2DLayeredHeight: Any
    cudaDevAttrMaxTexture2DLayeredLayers: Any
    cudaDevAttrMaxTexture2DLayeredWidth: Any
    cudaDevAttrMaxTexture2DLinearHeight: Any
    cudaDevAttrMaxTexture2DLinearPitch: Any
    cudaDevAttrMaxTexture2DLinearWidth: Any
    cudaDevAttrMaxTexture2DMipmappedHeight: Any
    cudaDevAttrMaxTexture2DMipmappedWidth: Any
    cudaDevAttrMaxTexture2DWidth: Any
    cudaDevAttrMaxTexture3DDepth: Any
    cudaDevAttrMaxTexture3DDepthAlt: Any
    cudaDevAttrMaxTexture3DHeight: Any
    cudaDevAttrMaxTexture3DHeightAlt: Any
    cudaDevAttrMaxTexture3DWidth: Any
    cudaDevAttrMaxTexture3DWidthAlt: Any
    cudaDevAttrMaxTextureCubemapLayeredLayers: Any
    cudaDevAttrMaxTextureCubemapLayeredWidth: Any
    cudaDevAttrMaxTextureCubemapWidth: Any
    cudaDevAttrMaxThreadsPerBlock: Any
    cudaDevAttrMaxThreadsPerMultiProcessor: Any
    cudaDevAttrMemSyncDomainCount: Any
    cudaDevAttrMemoryClockRate: Any
    cudaDevAttrMemoryPoolSupportedHandleTypes: Any
    cudaDevAttrMemoryPoolsSupported: Any
    cudaDevAttrMpsEnabled: Any
    cudaDevAttrMultiGpuBoardGroupID: Any
    cudaDevAttrMultiProcessorCount: Any
    cudaDevAttrNumaConfig: Any
    cudaDevAttrNumaId: Any
    cudaDevAttrOnlyPartialHostNativeAtomicSupported: Any
    cudaDevAttrOversizedSharedMemoryPerBlock: Any
    cudaDevAttrPageableMemoryAccess: Any
    cudaDevAttrPageableMemoryAccessUsesHostPageTables: Any
    cudaDevAttrPciBusId: Any
    cudaDevAttrPciDeviceId: Any
    cudaDevAttrPciDomainId: Any
    cudaDevAttrReserved122: Any
    cudaDevAttrReserved123: Any
    cudaDevAttrReserved124: Any
    cudaDevAttrReserved127: Any
    cudaDevAttrReserved128: Any
    cudaDevAttrReserved129: Any
    cudaDevAttrReserved132: Any
    cudaDevAttrReserved141: Any
    cudaDevAttrReserved145: Any
    cudaDevAttrReserved92: Any
    cudaDevAttrReserved93: Any
    cudaDevAttrReserved94: Any
    cudaDevAttrReserved96: Any
    cudaDevAttrReservedSharedMemoryPerBlock: Any
    cudaDevAttrSingleToDoublePrecisionPerfRatio: Any
    cudaDevAttrSparseCudaArraySupported: Any
    cudaDevAttrStreamPrioritiesSupported: Any
    cudaDevAttrSurfaceAlignment: Any
    cudaDevAttrTccDriver: Any
    cudaDevAttrTextureAlignment: Any
    cudaDevAttrTexturePitchAlignment: Any
    cudaDevAttrTimelineSemaphoreInteropSupported: Any
    cudaDevAttrTotalConstantMemory: Any
    cudaDevAttrUnifiedAddressing: Any
    cudaDevAttrVulkanCigSupported: Any
    cudaDevAttrWarpSize: Any

def cudaDeviceGetAttribute(attr, device): ...
class cudaDeviceProp:
    ECCEnabled: Any
    accessPolicyMaxWindowSize: Any
    asyncEngineCount: Any
    canMapHostMemory: Any
    canUseHostPointerForRegisteredMem: Any
    clusterLaunch: Any
    computePreemptionSupported: Any
    concurrentKernels: Any
    concurrentManagedAccess: Any
    cooperativeLaunch: Any
    deferredMappingCudaArraySupported: Any
    deviceNumaConfig: Any
    deviceNumaId: Any
    directManagedMemAccessFromHost: Any
    getPtr: Any
    globalL1CacheSupported: Any
    gpuDirectRDMAFlushWritesOptions: Any
    gpuDirectRDMASupported: Any
    gpuDirectRDMAWritesOrdering: Any
    gpuPciDeviceID: Any
    gpuPciSubsystemID: Any
    hostNativeAtomicSupported: Any
    hostNumaId: Any
    hostNumaMultinodeIpcSupported: Any
    hostRegisterReadOnlySupported: Any
    hostRegisterSupported: Any
    integrated: Any
    ipcEventSupported: Any
    isMultiGpuBoard: Any
    l2CacheSize: Any
    localL1CacheSupported: Any
    luid: Any
    luidDeviceNodeMask: Any
    major: Any
    managedMemory: Any
    maxBlocksPerMultiProcessor: Any
    maxGridSize: Any
    maxSurface1D: Any
    maxSurface1DLayered: Any
    maxSurface2D: Any
    maxSurface2DLayered: Any
    maxSurface3D: Any
    maxSurfaceCubemap: Any
    maxSurfaceCubemapLayered: Any
    maxTexture1D: Any
    maxTexture1DLayered: Any
    maxTexture1DMipmap: Any
    maxTexture2D: Any
    maxTexture2DGather: Any
    maxTexture2DLayered: Any
    maxTexture2DLinear: Any
    maxTexture2DMipmap: Any
    maxTexture3D: Any
    maxTexture3DAlt: Any
    maxTextureCubemap: Any
    maxTextureCubemapLayered: Any
    maxThreadsDim: Any
    maxThreadsPerBlock: Any
    maxThreadsPerMultiProcessor: Any
    memPitch: Any
    memoryBusWidth: Any
    memoryPoolSupportedHandleTypes: Any
    memoryPoolsSupported: Any
    minor: Any
    mpsEnabled: Any
    multiGpuBoardGroupID: Any
    multiProcessorCount: Any
    name: Any
    pageableMemoryAccess: Any
    pageableMemoryAccessUsesHostPageTables: Any
    pciBusID: Any
    pciDeviceID: Any
    pciDomainID: Any
    persistingL2CacheMaxSize: Any
    regsPerBlock: Any
    regsPerMultiprocessor: Any
    reservedSharedMemPerBlock: Any
    sharedMemPerBlock: Any
    sharedMemPerBlockOptin: Any
    sharedMemPerMultiprocessor: Any
    sparseCudaArraySupported: Any
    streamPrioritiesSupported: Any
    surfaceAlignment: Any
    tccDriver: Any
    textureAlignment: Any
    texturePitchAlignment: Any
    timelineSemaphoreInteropSupported: Any
    totalConstMem: Any
    totalGlobalMem: Any
    unifiedAddressing: Any
    unifiedFunctionPointers: Any
    uuid: Any
    warpSize: Any

def cudaDeviceSynchronize(): ...
def cudaDriverGetVersion(): ...
cudaEventBlockingSync: int
def cudaEventCreate(): ...
def cudaEventCreateFromEGLSync(eglSync, flags): ...
def cudaEventCreateWithFlags(flags): ...
cudaEventDefault: int
def cudaEventDestroy(event): ...
cudaEventDisableTiming: int
def cudaEventElapsedTime(start, end): ...
cudaEventInterprocess: int
def cudaEventQuery(event): ...
def cudaEventRecord(event, stream): ...
cudaEventRecordDefault: int
cudaEventRecordExternal: int
class cudaEventRecordNodeParams:
    ctx: Any
    event: Any
    getPtr: Any

def cudaEventRecordWithFlags(event, stream, flags): ...
def cudaEventSynchronize(event): ...
cudaEventWaitDefault: int
cudaEventWaitExternal: int
class cudaEventWaitNodeParams:
    event: Any
    getPtr: Any

class cudaEvent_t:
    getPtr: Any

def cudaFree(devPtr): ...
def cudaFreeAsync(devPtr, hStream): ...
def cudaFreeHost(ptr): ...
def cudaGetDevice(): ...
def cudaGetDeviceCount(): ...
def cudaGetDeviceFlags(): ...
def cudaGetDeviceProperties(device): ...
def cudaGetErrorName(error): ...
def cudaGetErrorString(error): ...
def cudaGetLastError(): ...
def cudaGraphDestroy(graph): ...
def cudaGraphExecDestroy(graphExec): ...
def cudaGraphExecUpdate(hGraphExec, hGraph): ...
def cudaGraphInstantiate(graph, flags): ...
class cudaGraphInstantiateFlags:
    cudaGraphInstantiateFlagAutoFreeOnLaunch: Any
    cudaGraphInstantiateFlagDeviceLaunch: Any
    cudaGraphInstantiateFlagUpload: Any
    cudaGraphInstantiateFlagUseNodePriority: Any

class cudaGraphInstantiateParams:
    errNode_out: Any
    flags: Any
    getPtr: Any
    result_out: Any
    uploadStream: Any

class cudaGraphInstantiateParams_st:
    errNode_out: Any
    flags: Any
    getPtr: Any
    result_out: Any
    uploadStream: Any

class cudaGraphInstantiateResult:
    cudaGraphInstantiateConditionalHandleUnused: Any
    cudaGraphInstantiateError: Any
    cudaGraphInstantiateInvalidStructure: Any
    cudaGraphInstantiateMultipleDevicesNotSupported: Any
    cudaGraphInstantiateNodeOperationNotSupported: Any
    cudaGraphInstantiateSuccess: Any

def cudaGraphInstantiateWithFlags(graph, flags): ...
def cudaGraphInstantiateWithParams(graph, instantiateParams): ...
def cudaGraphLaunch(graphExec, stream): ...
def cudaGraphUpload(graphExec, stream): ...
def cudaHostAlloc(size, flags): ...
cudaHostAllocDefault: int
cudaHostAllocMapped: int
cudaHostAllocPortable: int
cudaHostAllocWriteCombined: int
def cudaHostGetDevicePointer(pHost, flags): ...
def cudaHostRegister(ptr, size, flags): ...
def cudaHostUnregister(ptr): ...
def cudaMalloc(size): ...
def cudaMallocAsync(size, hStream): ...
def cudaMallocHost(size): ...
def cudaMemGetInfo(): ...
def cudaMemcpy(dst, src, count, kind): ...
def cudaMemcpyAsync(dst, src, count, kind, stream): ...
class cudaMemcpyKind:
    cudaMemcpyDefault: Any
    cudaMemcpyDeviceToDevice: Any
    cudaMemcpyDeviceToHost: Any
    cudaMemcpyHostToDevice: Any
    cudaMemcpyHostToHost: Any

def cudaMemset(devPtr, value, count): ...
def cudaMemsetAsync(devPtr, value, count, stream): ...
def cudaPeekAtLastError(): ...
def cudaRuntimeGetVersion(): ...
def cudaSetDevice(device): ...
def cudaStreamAddCallback(stream, callback, userData, flags): ...
def cudaStreamAttachMemAsync(stream, devPtr, length, flags): ...
class cudaStreamAttrID:
    cudaLaunchAttributeAccessPolicyWindow: Any
    cudaLaunchAttributeClusterDimension: Any
    cudaLaunchAttributeClusterSchedulingPolicyPreference: Any
    cudaLaunchAttributeCooperative: Any
    cudaLaunchAttributeDeviceUpdatableKernelNode: Any
    cudaLaunchAttributeIgnore: Any
    cudaLaunchAttributeLaunchCompletionEvent: Any
    cudaLaunchAttributeMemSyncDomain: Any
    cudaLaunchAttributeMemSyncDomainMap: Any
    cudaLaunchAttributeNvlinkUtilCentricScheduling: Any
    cudaLaunchAttributePortableClusterSizeMode: Any
    cudaLaunchAttributePreferredClusterDimension: Any
    cudaLaunchAttributePreferredSharedMemoryCarveout: Any
    cudaLaunchAttributePriority: Any
    cudaLaunchAttributeProgrammaticEvent: Any
    cudaLaunchAttributeProgrammaticStreamSerialization: Any
    cudaLaunchAttributeSharedMemoryMode: Any
    cudaLaunchAttributeSynchronizationPolicy: Any

class cudaStreamAttrValue:
    accessPolicyWindow: Any
    clusterDim: Any
    clusterSchedulingPolicyPreference: Any
    cooperative: Any
    deviceUpdatableKernelNode: Any
    getPtr: Any
    launchCompletionEvent: Any
    memSyncDomain: Any
    memSyncDomainMap: Any
    nvlinkUtilCentricScheduling: Any
    pad: Any
    portableClusterSizeMode: Any
    preferredClusterDim: Any
    priority: Any
    programmaticEvent: Any
    programmaticStreamSerializationAllowed: Any
    sharedMemCarveout: Any
    sharedMemoryMode: Any
    syncPolicy: Any

cudaStreamAttributeAccessPolicyWindow: int
cudaStreamAttributeMemSyncDomain: int
cudaStreamAttributeMemSyncDomainMap: int
cudaStreamAttributePriority: int
cudaStreamAttributeSynchronizationPolicy: int
def cudaStreamBeginCapture(stream, mode): ...
def cudaStreamBeginCaptureToGraph(stream, graph, dependencies, dependencyData, numDependencies, mode): ...
def cudaStreamBeginRecaptureToGraph(stream, mode, graph, callbackData): ...
class cudaStreamCallback_t:
    getPtr: Any

class cudaStreamCaptureMode:
    cudaStreamCaptureModeGlobal: Any
    cudaStreamCaptureModeRelaxed: Any
    cudaStreamCaptureModeThreadLocal: Any

class cudaStreamCaptureStatus:
    cudaStreamCaptureStatusActive: Any
    cudaStreamCaptureStatusInvalidated: Any
    cudaStreamCaptureStatusNone: Any

def cudaStreamCopyAttributes(dst, src): ...
def cudaStreamCreate(): ...
def cudaStreamCreateWithFlags(flags): ...
def cudaStreamCreateWithPriority(flags, priority): ...
cudaStreamDefault: int
def cudaStreamDestroy(stream): ...
def cudaStreamEndCapture(stream): ...
def cudaStreamGetAttribute(hStream, attr): ...
def cudaStreamGetCaptureInfo(stream): ...
def cudaStreamGetDevResource(hStream, typename): ...
def cudaStreamGetDevice(hStream): ...
def cudaStreamGetFlags(hStream): ...
def cudaStreamGetId(hStream): ...
def cudaStreamGetPriority(hStream): ...
def cudaStreamIsCapturing(stream): ...
cudaStreamLegacy: int
cudaStreamNonBlocking: int
cudaStreamPerThread: int
def cudaStreamQuery(stream): ...
def cudaStreamSetAttribute(hStream, attr, value): ...
def cudaStreamSynchronize(stream): ...
def cudaStreamUpdateCaptureDependencies(stream, dependencies, dependencyData, numDependencies, flags): ...
class cudaStreamUpdateCaptureDependenciesFlags:
    cudaStreamAddCaptureDependencies: Any
    cudaStreamSetCaptureDependencies: Any

def cudaStreamWaitEvent(stream, event, flags): ...
class cudaStream_t:
    getPtr: Any

