module "eks" {
  source  = "terraform-aws-modules/eks/aws"
  version = "~> 21.19"

  name               = var.name
  kubernetes_version = var.kubernetes_version

  vpc_id     = module.vpc.vpc_id
  subnet_ids = module.vpc.private_subnets

  endpoint_public_access                   = true
  endpoint_public_access_cidrs             = var.api_access_cidrs
  enable_cluster_creator_admin_permissions = true

  addons = {
    coredns                = {}
    eks-pod-identity-agent = { before_compute = true }
    kube-proxy             = {}
    vpc-cni = {
      before_compute = true
      # The chart's NetworkPolicies are kept only where the network plugin is told to.
      configuration_values = jsonencode({ enableNetworkPolicy = "true" })
    }
  }

  eks_managed_node_groups = {
    # Frontends, the control plane, Karpenter and the cluster's own pods.
    general = {
      ami_type       = "AL2023_x86_64_STANDARD"
      instance_types = ["m7i.2xlarge"]
      min_size       = 2
      max_size       = 4
      desired_size   = 2
      labels         = { "karpenter.sh/controller" = "true" }
    }

    # Workers. All EFA interfaces, a placement group and the rules of the security group come with enable_efa_support.
    efa = {
      ami_type           = "AL2023_x86_64_NVIDIA"
      instance_types     = [var.instance_type]
      enable_efa_support = true
      enable_efa_only    = true
      subnet_ids         = [module.vpc.private_subnets[0]]
      min_size           = var.gpu_nodes
      max_size           = max(var.gpu_nodes, 1)
      desired_size       = var.gpu_nodes

      capacity_reservation_specification = var.capacity_reservation_id == "" ? null : {
        capacity_reservation_target = { capacity_reservation_id = var.capacity_reservation_id }
      }

      labels = {
        "vpc.amazonaws.com/efa.present" = "true"
        "nvidia.com/gpu.present"        = "true"
      }
      taints = {
        gpu = { key = "nvidia.com/gpu", value = "true", effect = "NO_SCHEDULE" }
      }

      # The node's NVMe as one disk for images and emptyDir volumes: the chart's model cache is on it.
      cloudinit_pre_nodeadm = [{
        content_type = "application/node.eks.aws"
        content      = <<-EOT
          ---
          apiVersion: node.eks.aws/v1alpha1
          kind: NodeConfig
          spec:
            instance:
              localStorage:
                strategy: RAID0
        EOT
      }]
    }
  }

  # Karpenter's nodes are in this security group. EFA wants all traffic within the group, out as well as in.
  node_security_group_tags = { "karpenter.sh/discovery" = var.name }
  node_security_group_additional_rules = {
    efa_in = {
      description = "EFA between nodes"
      type        = "ingress"
      protocol    = "-1"
      from_port   = 0
      to_port     = 0
      self        = true
    }
    efa_out = {
      description = "EFA between nodes"
      type        = "egress"
      protocol    = "-1"
      from_port   = 0
      to_port     = 0
      self        = true
    }
  }
}

# What Karpenter needs in AWS; the controller itself is installed with its own chart, and karpenter.yaml after it.
module "karpenter" {
  source  = "terraform-aws-modules/eks/aws//modules/karpenter"
  version = "~> 21.19"

  cluster_name                    = module.eks.cluster_name
  create_pod_identity_association = true

  # karpenter.yaml names this role.
  node_iam_role_use_name_prefix = false
  node_iam_role_name            = "${var.name}-karpenter-node"
}
