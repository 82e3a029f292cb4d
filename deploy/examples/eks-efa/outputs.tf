output "kubeconfig_command" {
  description = "Writes the cluster into your kubeconfig."
  value       = "aws eks update-kubeconfig --region ${var.region} --name ${module.eks.cluster_name}"
}

output "karpenter_queue" {
  description = "For settings.interruptionQueue of Karpenter's chart."
  value       = module.karpenter.queue_name
}

output "karpenter_node_role" {
  description = "For spec.role of the EC2NodeClass in karpenter.yaml."
  value       = module.karpenter.node_iam_role_name
}
