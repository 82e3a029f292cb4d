variable "name" {
  description = "Name of the cluster, and the beginning of the names of what belongs to it."
  type        = string
  default     = "slipstream"
}

variable "region" {
  description = "AWS region."
  type        = string
}

variable "zone" {
  description = "Availability zone of the GPU nodes: one, since RDMA does not leave it. It must offer instance_type."
  type        = string
}

variable "other_zones" {
  description = "Further zones, for the control plane and nodes without GPUs. EKS needs one at least."
  type        = list(string)

  validation {
    condition     = length(var.other_zones) >= 1
    error_message = "other_zones: EKS wants subnets in two zones, so that one is needed besides var.zone."
  }
}

variable "kubernetes_version" {
  description = "The chart needs 1.30 or newer."
  type        = string
  default     = "1.34"
}

variable "instance_type" {
  description = "GPU instances with EFA."
  type        = string
  default     = "p5en.48xlarge"
}

variable "gpu_nodes" {
  description = "GPU nodes of the managed node group. 0: leave them all to Karpenter."
  type        = number
  default     = 2
}

variable "capacity_reservation_id" {
  description = "A capacity reservation for the managed node group; empty for none."
  type        = string
  default     = ""
}

variable "api_access_cidrs" {
  description = "Addresses from which the cluster's API may be reached, as 203.0.113.0/24. Not the whole internet by default."
  type        = list(string)
}
