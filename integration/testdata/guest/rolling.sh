# All gateways are restarted one after the other.
load 15 &
for n in 1 2 3; do
	host stop $n
	host start $n
	host whole
	[ $n = 3 ] || within 60 has_paths 2
done
wait $! || { cat /tmp/load; false; }
filled 33
