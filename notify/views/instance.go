package views

import (
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"belay/notify"
)

const azureInstancePath = "/metadata/instance"

// azureInstanceVersions are those of the API document, and 2021-08-01, which
// cloud-init asks for.
func azureInstanceVersions() []string {
	return []string{
		"2017-03-01", "2017-04-02", "2017-08-01", "2017-10-01", "2017-12-01", "2018-02-01", "2018-04-02",
		"2018-10-01", "2019-02-01", "2019-03-11", "2019-04-30", "2019-06-01", "2019-06-04", "2019-08-01",
		"2019-08-15", "2019-11-01", "2020-06-01", "2020-07-15", "2020-09-01", "2020-10-01", "2020-12-01",
		"2021-01-01", "2021-02-01", "2021-03-01", "2021-05-01", "2021-08-01", "2021-10-01", "2021-11-01",
		"2021-11-15", "2021-12-13", "2023-07-01", "2023-11-15", "2024-03-15", "2024-07-17", "2025-04-07",
	}
}

// azureInstance is a part of Azure's instance metadata (Microsoft Learn, "Azure
// Instance Metadata Service"), or one part of that by its path.
func azureInstance(c *call, path string) answer {
	if c.r.Method != http.MethodGet {
		return wrongMethod("GET")
	}
	if _, refused := azureRules(c, azureInstanceVersions(), http.StatusBadRequest); refused != nil {
		return *refused
	}
	i, there := c.source.Instance(c.guest)
	if !there {
		return azureError(http.StatusNotFound, "not found")
	}
	part, there := below(azureInstanceOf(i), strings.TrimPrefix(path, azureInstancePath))
	if !there {
		return azureError(http.StatusNotFound, "not found")
	}
	switch format, given := c.query.get("format"); {
	case !given, strings.EqualFold(format, "json"):
		return object(http.StatusOK, part).tag()
	case strings.EqualFold(format, "text"):
		return text(azureText(part)).tag()
	}
	return azureError(http.StatusBadRequest, "the format is not known: give json or text")
}

func azureInstanceOf(i notify.Instance) map[string]any {
	nics := make([]any, len(i.Interfaces))
	for n, nic := range i.Interfaces {
		v4, v6 := []any{}, []any{}
		for _, a := range nic.Addrs {
			ip := map[string]any{"privateIpAddress": a.String()}
			if a.Is4() {
				ip["publicIpAddress"] = ""
				v4 = append(v4, ip)
			} else {
				v6 = append(v6, ip)
			}
		}
		nics[n] = map[string]any{
			"macAddress": strings.ToUpper(strings.ReplaceAll(nic.MAC, ":", "")),
			"ipv4":       map[string]any{"ipAddress": v4},
			"ipv6":       map[string]any{"ipAddress": v6},
		}
	}
	return map[string]any{
		"compute": map[string]any{"name": i.Name, "vmId": i.UUID},
		"network": map[string]any{"interface": nics},
	}
}

// below finds what is at a path such as "/network/interface/0/macAddress"; "" is all.
func below(v any, path string) (part any, there bool) {
	for _, name := range strings.Split(strings.TrimSuffix(path, "/"), "/")[1:] {
		switch in := v.(type) {
		case map[string]any:
			if v, there = in[name]; !there {
				return nil, false
			}
		case []any:
			n, err := strconv.Atoi(name)
			if err != nil || n < 0 || n >= len(in) {
				return nil, false
			}
			v = in[n]
		default:
			return nil, false
		}
	}
	return v, true
}

// azureText is a value as text, and of what has parts their names.
func azureText(v any) string {
	var names []string
	switch in := v.(type) {
	case string:
		return in
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(in)) {
			if _, leaf := in[name].(string); !leaf {
				name += "/"
			}
			names = append(names, name)
		}
	case []any:
		for n := range in {
			names = append(names, strconv.Itoa(n)+"/")
		}
	}
	return strings.Join(names, "\n")
}
