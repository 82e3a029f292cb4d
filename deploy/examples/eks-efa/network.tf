locals {
  zones = concat([var.zone], var.other_zones)
}

module "vpc" {
  source  = "terraform-aws-modules/vpc/aws"
  version = "~> 6.6"

  name = var.name
  cidr = "10.0.0.0/16"
  azs  = local.zones

  # A GPU node with 16 interfaces takes many addresses: the private networks are wide.
  private_subnets = [for index, zone in local.zones : cidrsubnet("10.0.0.0/16", 3, index)]
  public_subnets  = [for index, zone in local.zones : cidrsubnet("10.0.0.0/16", 8, 240 + index)]

  enable_nat_gateway = true
  single_nat_gateway = true

  private_subnet_tags = {
    "karpenter.sh/discovery"          = var.name
    "kubernetes.io/role/internal-elb" = "1"
  }
  public_subnet_tags = {
    "kubernetes.io/role/elb" = "1"
  }
}
