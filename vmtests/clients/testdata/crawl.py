"""Prints what cloud-init's data sources find, as JSON."""

import json
import sys

from cloudinit import helpers
from cloudinit.sources import DataSourceAzure, DataSourceEc2

ec2 = DataSourceEc2.DataSourceEc2(
    {"datasource": {"Ec2": {"metadata_urls": ["http://169.254.169.254"]}}}, None, helpers.Paths({})
)
ec2._cloud_name = DataSourceEc2.CloudNames.AWS  # as in a guest whose SMBIOS says so
azure = DataSourceAzure.get_metadata_from_imds(retries=0, api_version=DataSourceAzure.IMDS_VER_WANT)
json.dump(
    {
        "ec2": ec2.crawl_metadata(),
        "azure": azure,
        "network": DataSourceAzure.generate_network_config_from_instance_network_metadata(azure["network"]),
    },
    sys.stdout,
    default=bytes.decode,
)
