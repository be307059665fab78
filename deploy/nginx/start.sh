#!/bin/sh
# Starts nginx, which by itself would serve an expired certificate without a word.
certificate=${CERTIFICATE:-/run/secrets/tls_certificate}
if ! ended=$(openssl x509 -in "$certificate" -noout -enddate -checkend 0 2>/dev/null); then
    echo "nginx: the certificate in $certificate cannot be used (${ended:-not a certificate});" \
        "put one there that has not expired: docs/deploy.md, Certificates" >&2
    exit 1
fi
exec nginx -c "${CONFIG:-/etc/nginx/nginx.conf}" -g "daemon off;"
