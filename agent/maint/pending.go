package maint

// PendingPackage is a newer package that the host's package manager would install, and who
// runs code of the one that is there.
type PendingPackage struct {
	Name     string `json:"name"`
	From     string `json:"from,omitempty"` // version; "" for one that is not there yet
	To       string `json:"to"`
	Security bool   `json:"security,omitempty"` // it comes from a security archive
	// QEMU is that guests' QEMUs have its files mapped, Units are systemd's services whose
	// processes have.
	QEMU  bool     `json:"qemu,omitempty"`
	Units []string `json:"units,omitempty"`
	// OwnUnits are the services that it brings along: installing it restarts them.
	OwnUnits []string `json:"own_units,omitempty"`
}

// Proposal is an update that was made up from what is pending.
type Proposal struct {
	Packages []PendingPackage `json:"packages"`
	Manifest string           `json:"manifest"` // TOML
	// Notes are what a person has to see to.
	Notes []string `json:"notes,omitempty"`
}
